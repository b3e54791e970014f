"""Parts of the public functions: a study's folder and file, searches, estimates, plans."""
