"""What codecs lose and what updates hold: fidelity, models, structure, open and closed loop."""
