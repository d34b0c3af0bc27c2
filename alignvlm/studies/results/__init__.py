"""What trained cells say: records of their folders, statistics over seeds, tables, and the page that shows them."""
