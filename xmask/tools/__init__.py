"""What people do with their own photos: predict, learn, correct, explore, export."""
