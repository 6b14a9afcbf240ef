"""The loss in other libraries' training loops. Each module is for one library, and imports it only when it is used."""
