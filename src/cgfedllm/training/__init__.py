"""Local training of one client, and the references federation is compared with."""
