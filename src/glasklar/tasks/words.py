"""Common words of both languages for counting letters; many with repeated letters."""

from __future__ import annotations

from typing import Final

from glasklar.tasks.base import Language


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: Final[dict[Language, tuple[str, ...]]] = {
    "en": _words("""
    strawberry banana raspberry blueberry blackberry cherry apple orange lemon melon pepper carrot cucumber tomato
    potato onion garlic cabbage spinach lettuce pumpkin broccoli mushroom coconut pineapple avocado apricot coffee
    butter cheese cookie chocolate vanilla cinnamon ginger sugar honey pancake sandwich noodle burger pizza pretzel
    yogurt dinner breakfast lunch supper bottle kettle teapot saucer spoon kitchen bedroom bathroom cellar garage
    garden balcony window mirror curtain carpet pillow blanket mattress drawer wardrobe cupboard bookshelf table
    chair sofa lamp candle lantern ladder hammer needle scissors button zipper sweater jacket trousers stocking
    slipper sneaker necklace bracelet earring wallet umbrella suitcase backpack bicycle tractor railway airplane
    rocket balloon sailboat ferry harbour bridge tunnel street avenue village city country mountain valley river
    ocean island desert forest meadow glacier volcano canyon waterfall rainbow thunder lightning blizzard summer
    winter spring autumn weather weekend holiday morning evening midnight tomorrow yesterday calendar minute second
    hour decade century history future present memory mystery secret puzzle riddle legend fairy dragon wizard witch
    castle tower palace kingdom queen prince princess knight soldier general captain sailor pilot driver farmer
    baker butcher teacher professor student doctor nurse dentist lawyer judge painter singer dancer actor actress
    author writer reader editor letter message address envelope postcard parcel package library museum theatre
    cinema concert guitar piano violin trumpet drum flute whistle melody rhythm chorus orchestra football tennis
    hockey soccer baseball basketball cricket swimming running jumping cycling skating skiing rowing sailing boxing
    wrestling victory trophy medal winner champion referee animal elephant giraffe leopard cheetah panther tiger
    lion monkey gorilla kangaroo koala rabbit squirrel hamster ferret otter beaver badger raccoon hedgehog donkey
    zebra camel llama buffalo sheep goat puppy kitten parrot pigeon sparrow swallow penguin ostrich flamingo eagle
    falcon raven seagull turtle tortoise lizard alligator crocodile serpent dolphin whale shark salmon herring
    lobster oyster octopus jellyfish butterfly dragonfly mosquito beetle grasshopper spider worm snail insect flower
    rose tulip lily daisy orchid sunflower lavender clover grass willow maple cedar chestnut acorn branch leaf root
    berry seed blossom bamboo cotton leather metal copper silver golden bronze iron steel plastic rubber paper
    crystal diamond emerald ruby pearl marble granite pebble gravel cement brick timber lumber yellow purple green
    scarlet violet happy funny silly clever pretty gentle little bitter sweet yummy creamy salty hungry thirsty
    sleepy lazy busy hurry worry sorry merry carry marry jelly belly bunny penny dagger trigger bigger better matter
    runner settle rattle battle cattle middle saddle paddle puddle muddle bubble wobble gobble giggle wiggle juggle
    struggle ripple topple people simple sample temple example problem number figure syllable sentence question
    answer grammar alphabet language dialect chapter passage paragraph success process progress possess assess
    discuss express impress suppress access excess recess business illness fitness darkness kindness happiness
    sadness madness witness harness waitress hostess committee toffee employee refugee degree agree freedom sixteen
    nineteen seventeen eighteen fifteen between deepest sleeper geese breeze freezer tweezer sneeze squeeze feeder
    leader teenager engineer pioneer volunteer career cheer deer steer bumblebee beehive teepee mississippi
    tennessee alabama missouri hawaii colorado canada panama jamaica bahamas argentina australia austria africa
    america asia antarctica europe england scotland ireland sweden norway finland denmark belgium germany france
    italy spain portugal greece turkey russia poland hungary romania bulgaria croatia slovenia egypt morocco tunisia
    algeria nigeria kenya tanzania india china japan korea vietnam thailand indonesia philippines malaysia mexico
    brazil colombia venezuela ecuador bolivia chile peru computer keyboard monitor printer scanner internet network
    server browser software hardware program function variable parameter algorithm database password security
    science physics chemistry biology geometry algebra statistics astronomy planet mercury venus saturn jupiter
    uranus neptune galaxy universe satellite telescope gravity energy electron neutron nucleus molecule element
    hydrogen oxygen nitrogen carbon helium calcium sodium chlorine engine motor wheel tyre brake pedal steering
    corner traffic accident hospital medicine bandage injury fever headache stomach shoulder finger elbow ankle
    muscle skeleton nostril eyebrow eyelash forehead tongue throat family mother father sister brother daughter
    cousin nephew uncle parent grandmother grandfather husband baby toddler neighbour friend stranger visitor guest
    party birthday wedding festival parade carnival ceremony anniversary parallel tattoo bassoon cartoon afternoon
    classroom ballroom bookkeeper cappuccino spaghetti zucchini mozzarella salami papaya pajamas bananas satellites
    assassin possession possesses millennium
    """),
    "de": _words("""
    Erdbeere Himbeere Brombeere Blaubeere Kirsche Apfel Birne Pflaume Orange Zitrone Melone Banane Ananas Traube
    Tomate Gurke Karotte Kartoffel Zwiebel Paprika Spinat Salat Kürbis Rettich Bohne Erbse Linse Pilz Knoblauch
    Petersilie Ingwer Zimt Zucker Honig Butter Käse Sahne Joghurt Quark Brötchen Brezel Kuchen Torte Keks Schokolade
    Pudding Nudel Suppe Soße Pfannkuchen Frühstück Mittag Abendbrot Messer Gabel Löffel Teller Tasse Kanne Flasche
    Becher Schüssel Pfanne Kessel Küche Zimmer Keller Garage Garten Balkon Terrasse Fenster Spiegel Vorhang Teppich
    Kissen Decke Matratze Schublade Schrank Regal Tisch Stuhl Sessel Sofa Lampe Kerze Laterne Leiter Hammer Nadel
    Schere Knopf Jacke Mantel Hose Socke Strumpf Pullover Stiefel Mütze Handschuh Kette Ring Brille Tasche Koffer
    Rucksack Fahrrad Traktor Eisenbahn Flugzeug Rakete Ballon Segelboot Fähre Hafen Brücke Tunnel Straße Allee Dorf
    Stadt Land Gebirge Hügel Tal Fluss Bach Ozean Insel Wüste Wald Wiese Gletscher Vulkan Wasserfall Regenbogen
    Donner Blitz Gewitter Nebel Schnee Hagel Sommer Winter Frühling Herbst Wetter Wochenende Ferien Morgen Abend
    Mitternacht Gestern Kalender Minute Sekunde Stunde Woche Monat Jahr Jahrhundert Geschichte Zukunft Gegenwart
    Erinnerung Geheimnis Rätsel Märchen Drache Zauberer Hexe Burg Schloss Turm Palast König Königin Prinz Prinzessin
    Ritter Soldat General Kapitän Matrose Pilot Fahrer Bauer Bäcker Metzger Lehrer Lehrerin Professor Student Ärztin
    Arzt Zahnarzt Richter Anwalt Maler Sänger Tänzer Schauspieler Autor Leser Brief Nachricht Adresse Umschlag
    Postkarte Paket Bücherei Museum Theater Kino Konzert Gitarre Klavier Geige Trompete Trommel Flöte Pfeife Melodie
    Rhythmus Chor Orchester Fußball Tennis Handball Hockey Schwimmen Rennen Springen Rudern Segeln Boxen Ringen
    Sieger Pokal Medaille Meister Schiedsrichter Tier Elefant Giraffe Leopard Panther Tiger Löwe Affe Gorilla
    Känguru Hase Kaninchen Eichhörnchen Hamster Otter Biber Dachs Waschbär Igel Esel Zebra Kamel Lama Büffel Schaf
    Ziege Welpe Katze Kater Hund Papagei Taube Spatz Schwalbe Pinguin Strauß Adler Falke Rabe Möwe Schildkröte
    Eidechse Krokodil Schlange Delfin Wal Hai Lachs Hering Hummer Auster Krake Qualle Schmetterling Libelle Mücke
    Käfer Heuschrecke Spinne Wurm Schnecke Insekt Ameise Biene Hummel Wespe Blume Rose Tulpe Lilie Orchidee
    Sonnenblume Lavendel Klee Gras Weide Ahorn Tanne Fichte Buche Eiche Kastanie Eichel Zweig Blatt Wurzel Beere
    Samen Blüte Bambus Baumwolle Leder Metall Kupfer Silber Gold Bronze Eisen Stahl Plastik Gummi Papier Kristall
    Diamant Smaragd Rubin Perle Marmor Granit Kiesel Zement Ziegel Bretter Messing Teer Kaffee Tee Armee Idee Fee
    Kollege Kollegin Karussell Kommissar Programm Grammatik Kilometer Zentimeter Thermometer Barometer Telefon
    Tablette Etikett Ballett Tablett Skelett Kompass Reparatur Temperatur Literatur Natur Kultur Figur Rechner
    Computer Tastatur Bildschirm Drucker Netzwerk Programmierer Funktion Variable Datenbank Passwort Sicherheit
    Wissenschaft Physik Chemie Biologie Geometrie Algebra Statistik Planet Merkur Venus Saturn Jupiter Neptun
    Galaxie Universum Satellit Teleskop Schwerkraft Energie Elektron Neutron Molekül Element Wasserstoff Sauerstoff
    Stickstoff Kohlenstoff Motor Räder Reifen Bremse Pedal Lenkrad Kreuzung Verkehr Unfall Krankenhaus Medizin
    Verband Verletzung Fieber Kopfschmerz Magen Schulter Finger Ellbogen Knöchel Muskel Augenbraue Wimper Stirn
    Zunge Hals Familie Mutter Vater Schwester Bruder Tochter Cousine Neffe Nichte Onkel Tante Eltern Oma Opa
    Großmutter Großvater Nachbar Freundin Freund Besucher Gast Feier Geburtstag Geschenk Hochzeit Festival Umzug
    Karneval Zeremonie Jubiläum Deutschland Österreich Schweiz Frankreich Italien Spanien Portugal Griechenland
    Türkei Russland Polen Ungarn Rumänien Bulgarien Kroatien Slowenien Ägypten Marokko Tunesien Algerien Nigeria
    Kenia Indien China Japan Korea Vietnam Thailand Mexiko Brasilien Kolumbien Ecuador Bolivien Kanada Panama Berlin
    Hamburg München Köln Frankfurt Stuttgart Dresden Leipzig Hannover Nürnberg Bremen Bonn Essen Mannheim Karlsruhe
    Augsburg Wiesbaden Münster Aachen Kiel Lübeck Rostock Erfurt Mainz Potsdam Passau Regensburg Ulm Wien Salzburg
    Innsbruck Graz Zürich Basel Bern Genf Luzern Donau Elbe Rhein Neckar Mosel Weser Isar Spree nennen rennen kennen
    können müssen lassen essen messen fressen vergessen besser Wasser nass Klasse Masse Kasse Rasse Gasse Bitte
    Mitte Hütte Wette Fett Bett nett satt glatt Ratte Matte Watte Motte Lotte Futter Zettel Sattel Mittel Drittel
    Viertel Achtel Zehntel elf zwölf sechzehn siebzehn dreizehn vierzehn fünfzehn zwanzig dreißig vierzig fünfzig
    sechzig siebzig achtzig neunzig hundert tausend Million Milliarde leben lieben lesen sehen gehen stehen
    verstehen fehlen zählen wählen erzählen spielen lernen denken fragen antworten rechnen schreiben sprechen hören
    fühlen schmecken riechen arbeiten schlafen träumen laufen springen klettern wandern tanzen singen lachen weinen
    kochen backen trinken kaufen verkaufen bezahlen helfen suchen finden verlieren gewinnen beginnen beenden groß
    klein schnell langsam hell dunkel laut leise warm kalt heiß trocken sauber schmutzig neu alt jung schön hässlich
    klug dumm stark schwach reich arm lustig traurig fröhlich müde wach hungrig durstig krank gesund sicher
    gefährlich einfach schwierig richtig falsch offen geschlossen leer voll süß sauer bitter salzig scharf weich
    hart rund eckig gerade schief immer niemals manchmal vielleicht sofort später gestern heute morgen oben unten
    links rechts vorne hinten innen außen Anna Otto Hannah Barbara Annabella Reliefpfeiler Rentner Lagerregal Radar
    Kajak Nebelleben Erdbeerbeet Teebeutel Seerosensee Schifffahrt Betttuch Pappplakat Flussschiff Kongress Prozess
    Prozessor Interesse Presse Kompressor Assessor Rosine Lawine
    """),
}
