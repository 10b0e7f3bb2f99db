"""One run: its plan, the loop over images, records that survive a kill."""
