"""What is asked: one request, the names of clients, and chat templates."""
