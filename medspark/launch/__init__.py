"""The one place where Spark and torch meet: Spark starts the ranks, and we watch over them."""
