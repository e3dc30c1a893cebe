"""What docs/reliability.md promises: short forms run with every test run, long forms behind `slow`."""
