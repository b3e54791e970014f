"""What the verbs are made of: a study's folder and file, launches, estimates, plans."""
