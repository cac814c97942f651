"""MLflow, figures, reports: the study as others read it. Nothing here decides anything."""
