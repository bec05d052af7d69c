"""What several tests share, and programs that some of them run in a process of their own."""
