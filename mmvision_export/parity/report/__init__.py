"""What is shown of a comparison: tables on the terminal, and a page with its figures."""
