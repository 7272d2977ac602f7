"""Small networks in the layouts of public projects that use efficient-KAN's KANLinear.

Each is written anew from what its project does, and names that project. `catalogue.LAYOUTS` lists
them; `python -m tests.layouts` exports each one and prints a table; `make test-layouts` tests them.
"""
