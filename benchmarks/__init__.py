"""Speed and memory against other libraries; each module is a command that writes one JSON file to results/."""
