"""A run of a driver: what it is known by, where it writes, how it ends and how it goes on.

run.py          the folder of a run, its resume and its endings   identity.py   which settings a run is known by
checkpoints.py  which checkpoints are whole                       script.py     the command that started it, to repeat
card.py         trained adapters to give away, with a README.md    room.py   what fits where memory ran out
launch.py       a process a GPU
"""
