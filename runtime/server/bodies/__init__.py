"""What requests may say: a body for each route, in which every field is checked before anything is queued."""
