"""The student: the network on one page, its exact cheap form, and the fields that it leaves."""
