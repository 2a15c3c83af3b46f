"""A deterministic simulation of agent, first and second appliance: seeded histories of faults, checked invariants."""
