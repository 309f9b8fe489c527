"""What the recipes share: the loop, its data, schedules, measurements and pictures."""
