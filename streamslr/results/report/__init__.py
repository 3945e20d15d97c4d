"""One HTML page of a run, finished or not.

page.py fills the template page.html. figures.py draws the errors of linears and blocks, costs.py time, memory and
size, all from the journal alone; layout.py holds what they share.
"""
