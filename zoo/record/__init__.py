"""What is said about a checkpoint, and proved: report, card, verification, publication."""
