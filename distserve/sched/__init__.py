"""What should be done: the three state machines and the policies they consult. Pure: no I/O, no clock, no tensor."""
