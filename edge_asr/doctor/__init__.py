"""Will this machine run the appliance, and if not, what must be done?"""
