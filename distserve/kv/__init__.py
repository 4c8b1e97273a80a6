"""Who holds which block: contiguous groups, the prefix cache and the ledger over both. No tensors, no I/O."""
