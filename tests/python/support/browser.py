"""A headless Chromium, and the pages that it shows; screenshots are kept in `target/screenshots`."""

import contextlib
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from support.servers import find
from support.waiting import until

SCREENSHOTS = Path(__file__).resolve().parents[3] / "target" / "screenshots"

OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--window-size=1400,1000",
]  # fmt: skip


class Browser:
    def __init__(self, folder: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = find("chromium")
        for option in [*OPTIONS, f"--user-data-dir={folder}"]:
            options.add_argument(option)
        service = Service(find("chromedriver"), log_output=str(folder / "driver.log"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(WebDriverException):
            self.driver.quit()

    def open(self, url):
        # A page that differs in its fragment only would not be loaded again.
        self.driver.get("about:blank")
        self.driver.get(url)

    def texts(self, css):
        """Text of every element that matches, shown or in a tab that is not."""
        return [
            element.get_attribute("textContent").strip() for element in self.driver.find_elements(By.CSS_SELECTOR, css)
        ]

    def table(self, css):
        """Rows of a table's body, each a list of texts."""
        rows = self.driver.find_elements(By.CSS_SELECTOR, f"{css} tbody tr")
        return [
            [cell.get_attribute("textContent").strip() for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows
        ]

    def until(self, condition, what, timeout=30):
        """The first true value of `condition`; pages that change while they are read are read again."""

        def ask():
            try:
                return condition()
            except StaleElementReferenceException:
                return None

        return until(ask, lambda: f"{what} on {self.driver.current_url}:\n{self.body()}", timeout, every=0.1)

    def body(self):
        with contextlib.suppress(WebDriverException):
            return self.driver.find_element(By.TAG_NAME, "body").text
        return ""

    def fill(self, css, text):
        field = self.driver.find_element(By.CSS_SELECTOR, css)
        self.driver.execute_script("arguments[0].value = arguments[1]", field, str(text))

    def click(self, css):
        """Also what lies in a tab or a menu that is not shown."""
        self.driver.execute_script("arguments[0].click()", self.driver.find_element(By.CSS_SELECTOR, css))

    def screenshot(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
