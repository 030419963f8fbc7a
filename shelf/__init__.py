"""What is not needed to understand or to run A3PO: knobs, data, folders, checks, reports."""
