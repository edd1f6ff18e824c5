"""What paging.py promises."""

import unittest

from paging import page, page_count


class Paging(unittest.TestCase):
    def test_full_pages(self):
        """Entries that fill their pages need no other page."""
        self.assertEqual(page_count(20, 10), 2)
        self.assertEqual(page(list(range(20)), 2, 10), list(range(10, 20)))

    def test_the_last_page_holds_the_rest(self):
        """What is left over gets a page of its own."""
        self.assertEqual(page_count(21, 10), 3)
        self.assertEqual(page(list(range(21)), 3, 10), [20])

    def test_no_entries_need_no_page(self):
        """Nothing is shown on no page."""
        self.assertEqual(page_count(0, 10), 0)

    def test_there_is_no_page_beyond_the_last(self):
        """Who asks for a page too many is told so."""
        with self.assertRaises(IndexError):
            page(list(range(20)), 3, 10)


if __name__ == "__main__":
    unittest.main()
