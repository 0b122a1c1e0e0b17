"""What ships: converting a checkpoint into a folder that loads by itself, and sending that folder to the Hub."""
