"""Real faults (signals, full disks, damaged files) against real runs; see conftest.py."""
