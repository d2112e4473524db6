"""What can be told before anything runs, without torch: rules, memory, time, money."""
