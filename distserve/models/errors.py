"""What may go wrong between a model's name and a loaded model. Each message is a sentence for the user.

ModelError
├── ModelNotFound       the name leads to no model here
├── UnsupportedModel    a model, but not one we can run as configured
└── WeightsError        weights missing, damaged or of the wrong shape
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of this tree; its text says what is wrong and what to do."""


class ModelNotFound(ModelError):
    """The name is neither a directory, nor a file, nor an alias that can be resolved here."""


class UnsupportedModel(ModelError):
    """The architecture, or a feature its configuration asks for, is not implemented."""


class WeightsError(ModelError):
    """A weight file or tensor is missing, damaged, or does not fit the configuration."""
