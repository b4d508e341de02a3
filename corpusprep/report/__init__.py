"""What a run says: progress, accounts of rows, tables."""
