"""Commands that stop, kill and overload the service under load, and check what docs/operate.md
promises. tests/test_stress.py runs them in short forms.
"""
