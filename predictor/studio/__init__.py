"""The studio: essence transfer in a browser, served by this machine (extra `studio`).

`session.py` does the work on targets and sources, `page.py` is what people see of it.
"""
