"""How the whole appliance does on this machine: latency over a replay, and what it takes while nobody speaks."""
