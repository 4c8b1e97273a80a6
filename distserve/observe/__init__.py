"""What happened: the journal of every machine, metrics read off it, logging set-up. Decides nothing."""
