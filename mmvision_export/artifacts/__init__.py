"""What lies on disk: model directories, engines and libraries, with their records."""
