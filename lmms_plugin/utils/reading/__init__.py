"""What files and users say, checked: every error in one line that names the place."""
