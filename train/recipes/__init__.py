"""What a recipe says, what it becomes, and how it runs."""
