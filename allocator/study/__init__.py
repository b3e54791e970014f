"""The search as an Optuna study: its trials, how they end, and where they are stored."""
