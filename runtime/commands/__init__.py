"""The runtime's commands, their options, and how results look in a terminal and on a page."""
