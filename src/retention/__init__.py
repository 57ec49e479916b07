"""Which positions survived: stored, measured, drawn. It knows no engine and no run."""
