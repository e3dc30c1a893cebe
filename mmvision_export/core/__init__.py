"""What every part uses and that knows nothing of models: errors, progress, files, numbers."""
