"""The README's examples do what they show."""

import doctest
import os
import unittest

from .case import HERE, Case, psoup


class Readme(Case):
    def test_the_examples(self):
        back = os.getcwd()
        os.chdir(self.work)
        try:
            failed, tried = doctest.testfile(os.path.join(HERE, "..", "README.md"), module_relative=False,
                                             optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        finally:
            os.chdir(back)
        self.assertEqual(failed, 0)
        self.assertGreater(tried, 15)

    def test_the_error_has_the_words_that_are_shown(self):
        with open(os.path.join(HERE, "..", "README.md"), encoding="utf-8") as f:
            shown = [line.split(": ", 1)[1].strip() for line in f if line.startswith("psoup.errors.")]
        back = os.getcwd()
        os.chdir(self.work)
        try:
            psoup.Model("nowhere")
        except psoup.FileError as error:
            self.assertEqual([str(error)], shown)
        finally:
            os.chdir(back)


if __name__ == "__main__":
    unittest.main()
