"""Networks that measure and never generate: faces, lips, phones, contacts.

May import the core and the mel front end. Trained and frozen before any generator.
"""
