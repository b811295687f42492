"""Pictures of one's own digits, and what a trained model says about them."""
