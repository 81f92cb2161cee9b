"""Which models are on this machine, and how do they get here?"""
