"""What a running service does when it is stopped, killed or overloaded: commands that show it."""
