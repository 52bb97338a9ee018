"""Files made to hurt: see cases.py."""
