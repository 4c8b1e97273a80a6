"""How long a step takes on given hardware: one interface (``base``), several models behind it."""
