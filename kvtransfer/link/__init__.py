"""What stands between two workers before the first block moves: proof, agreement, and a tested transport."""
