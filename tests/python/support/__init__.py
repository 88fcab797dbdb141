"""What the tests stand on: private servers, worker processes, a stage to act on, and a way to wait."""
