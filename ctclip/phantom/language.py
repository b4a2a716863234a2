"""Phrasings of radiologists for each abnormality, for its absence, and for a normal chest.

Placeholders: {where} a lobe or side ("the right upper lobe", "both lungs"), {side}, {size} in mm, {severity},
{number} ("a", "several"). Our own sentences; none is taken from a data set.
"""

from __future__ import annotations

# For each abnormality: phrasings for the findings section, for the impression, and for its absence.
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "Medical material": (
        (
            "An implanted {kind} is seen.", "There is a {kind} in place.", "Medical material ({kind}) is observed.",
            "The {kind} is in its expected position.", "Status after implantation of a {kind}.",
            "Metallic artefacts are caused by a {kind}.",
        ),
        ("{Kind} in place.", "Medical material: {kind}.", "Indwelling {kind}.", "Status after {kind}."),
        ("No medical material is seen.", "There is no catheter or implanted device.", "No surgical material is present."),
    ),
    "Arterial wall calcification": (
        (
            "{Severity} calcified plaques are seen in the wall of the thoracic aorta.",
            "There are {severity} atherosclerotic calcifications of the aortic arch.",
            "Arterial wall calcification of {severity} degree is observed.",
            "The aortic wall shows {severity} calcification.", "Calcific atheroma lines the aorta.",
            "Wall calcifications are present in the arch and descending aorta.",
        ),
        ("Aortic atherosclerosis.", "{Severity} arterial wall calcification.", "Calcified aortic plaques.", "Atherosclerotic calcification of the aorta."),
        ("No calcified plaque is seen in the aorta.", "The aortic wall is free of calcification.", "No arterial wall calcification is observed."),
    ),
    "Cardiomegaly": (
        (
            "The heart is {severity_ly} enlarged.", "Heart size is increased.", "{Severity} cardiomegaly is present.",
            "The cardiothoracic ratio is above normal.", "There is {severity} enlargement of the heart.",
            "The cardiac silhouette is larger than normal.",
        ),
        ("Cardiomegaly.", "{Severity} cardiomegaly.", "Enlarged heart.", "Increased heart size."),
        ("Heart size is normal.", "The heart is not enlarged.", "Heart size is within normal limits.", "No cardiomegaly is seen."),
    ),
    "Pericardial effusion": (
        (
            "There is a {severity} pericardial effusion of {size} mm.", "Pericardial fluid measuring {size} mm is seen.",
            "A {severity} amount of fluid surrounds the heart.", "{Severity} pericardial effusion is observed.",
            "Fluid is present in the pericardial space.", "The pericardial space holds fluid up to {size} mm thick.",
        ),
        ("Pericardial effusion.", "{Severity} pericardial effusion.", "Fluid around the heart.", "Pericardial effusion of {size} mm."),
        ("No pericardial effusion is seen.", "There is no pericardial fluid.", "Pericardial effusion is not observed."),
    ),
    "Coronary artery wall calcification": (
        (
            "{Severity} calcifications are seen in the coronary arteries.", "There are calcified plaques along the coronary arteries.",
            "Coronary artery wall calcification of {severity} degree is observed.", "The left anterior descending artery is calcified.",
            "Calcific coronary atherosclerosis is present.", "Coronary walls show {severity} calcification.",
        ),
        ("Coronary artery calcification.", "{Severity} coronary calcification.", "Coronary atherosclerosis.", "Calcified coronary plaques."),
        ("No coronary calcification is seen.", "The coronary arteries are free of calcified plaque.", "Coronary artery calcification is not observed."),
    ),
    "Hiatal hernia": (
        (
            "A {severity} hiatal hernia is seen.", "There is a sliding hiatal hernia.", "The stomach herniates into the chest through the hiatus.",
            "A hiatal hernia lies behind the heart.", "Hiatal hernia of {severity} size is observed.", "Part of the stomach is above the diaphragm.",
        ),
        ("Hiatal hernia.", "{Severity} hiatal hernia.", "Sliding hiatal hernia.", "Gastric hernia through the hiatus."),
        ("No hiatal hernia is seen.", "The hiatus is normal without hernia.", "Hiatal hernia is not observed."),
    ),
    "Lymphadenopathy": (
        (
            "Enlarged {kind} lymph nodes up to {size} mm are seen.", "There is {kind} lymphadenopathy, the largest node {size} mm.",
            "{Severity} {kind} lymphadenopathy is observed.", "Pathologically enlarged lymph nodes are present.",
            "Several lymph nodes exceed 10 mm in short axis.", "Lymph nodes of {size} mm short axis are noted in {kind} stations.",
        ),
        ("{Kind} lymphadenopathy.", "Enlarged lymph nodes.", "Lymphadenopathy.", "Pathologic {kind} lymph nodes."),
        ("No enlarged lymph node is seen.", "There is no lymphadenopathy.", "No pathologically enlarged lymph nodes are observed."),
    ),
    "Emphysema": (
        (
            "{Severity} centrilobular emphysema is seen in the upper lobes.", "Emphysematous changes are present in both lungs.",
            "There is {severity} emphysema.", "The upper lobes show emphysematous destruction.", "Emphysema of {severity} degree is observed.",
            "Areas of low attenuation without walls are consistent with emphysema.",
        ),
        ("Emphysema.", "{Severity} emphysema.", "Emphysematous lungs.", "Centrilobular emphysema."),
        ("No emphysema is seen.", "There are no emphysematous changes.", "Emphysema is not observed."),
    ),
    "Atelectasis": (
        (
            "Linear atelectasis is seen in {where}.", "There are {severity} atelectatic changes in {where}.", "Plate-like atelectasis of {where} is observed.",
            "Subsegmental atelectasis is present in {where}.", "Atelectasis is noted in {where}.", "Bands of atelectasis cross {where}.",
        ),
        ("Atelectasis in {where}.", "Atelectasis.", "Linear atelectasis.", "{Severity} atelectatic change."),
        ("No atelectasis is seen.", "There is no atelectasis or volume loss.", "Atelectasis is not observed."),
    ),
    "Lung nodule": (
        (
            "{Number} {kind} nodule of {size} mm is seen in {where}.", "There is a pulmonary nodule measuring {size} mm in {where}.",
            "A nodule of {size} mm in diameter is observed in {where}.", "{where_cap} holds a {kind} nodule of {size} mm.",
            "Nodular lesion in {where}, {size} mm.", "A {size} mm lung nodule is present in {where}.",
        ),
        ("Pulmonary nodule in {where}.", "Lung nodule of {size} mm.", "Nodule, {size} mm.", "Lung nodule; follow-up is advised."),
        ("No pulmonary nodule is seen.", "There is no nodule or mass.", "No lung nodule is observed."),
    ),
    "Lung opacity": (
        (
            "Ground-glass opacities are seen in {where}.", "There are {severity} patchy opacities in {where}.", "Hazy ground-glass density is present in {where}.",
            "Lung opacity of {severity} extent is observed in {where}.", "{where_cap} shows ground-glass opacity.", "Ground-glass areas are noted in {where}.",
        ),
        ("Ground-glass opacities in {where}.", "Lung opacity.", "Ground-glass opacities, possibly infectious.", "{Severity} pulmonary opacities."),
        ("No ground-glass opacity is seen.", "There is no pulmonary opacity.", "No lung opacity is observed."),
    ),
    "Pulmonary fibrotic sequela": (
        (
            "Fibrotic sequelae are seen in {where}.", "There are sequela fibrotic bands in {where}.", "{Severity} fibrotic sequela changes are present in {where}.",
            "Parenchymal scarring is observed in {where}.", "{where_cap} shows fibrotic strands of sequela nature.", "Pulmonary fibrotic sequela is noted in {where}.",
        ),
        ("Fibrotic sequelae in {where}.", "Pulmonary fibrotic sequela.", "Sequela changes.", "Fibrotic scarring."),
        ("No fibrotic sequela is seen.", "There are no fibrotic changes.", "Fibrotic sequelae are not observed."),
    ),
    "Pleural effusion": (
        (
            "There is a {severity} {side} pleural effusion.", "{Severity} pleural effusion is seen {on_side}.", "Fluid is present in the pleural space {on_side}.",
            "Pleural effusion of {severity} degree is observed {on_side}.", "The {side} pleural space holds fluid.", "{Side_cap} pleural fluid collects posteriorly.",
        ),
        ("{Side_cap} pleural effusion.", "Pleural effusion.", "{Severity} pleural effusion.", "Pleural fluid {on_side}."),
        ("No pleural effusion is seen.", "There is no pleural fluid.", "Pleural effusion is not observed."),
    ),
    "Mosaic attenuation pattern": (
        (
            "A {severity} mosaic attenuation pattern is seen in both lungs.", "The lungs show mosaic attenuation.", "Mosaic perfusion is present in both lungs.",
            "There is patchwork attenuation of mosaic type.", "Mosaic attenuation pattern of {severity} degree is observed.", "Lobular areas of unequal density form a mosaic pattern.",
        ),
        ("Mosaic attenuation pattern.", "Mosaic attenuation, suggesting small airway disease.", "{Severity} mosaic attenuation.", "Mosaic perfusion."),
        ("No mosaic attenuation is seen.", "Lung attenuation is homogeneous without mosaic pattern.", "Mosaic attenuation is not observed."),
    ),
    "Peribronchial thickening": (
        (
            "Peribronchial thickening is seen in both lungs.", "The bronchial walls are {severity_ly} thickened.", "There is {severity} peribronchial wall thickening.",
            "Thickened bronchial walls are present.", "Peribronchial cuffing is observed.", "Bronchial wall thickening of {severity} degree is noted.",
        ),
        ("Peribronchial thickening.", "{Severity} bronchial wall thickening.", "Thickened bronchial walls.", "Peribronchial cuffing."),
        ("No peribronchial thickening is seen.", "Bronchial walls are not thickened.", "Peribronchial thickening is not observed."),
    ),
    "Consolidation": (
        (
            "A consolidation is seen in {where}.", "There is {severity} consolidation with air bronchograms in {where}.", "Airspace consolidation is present in {where}.",
            "{where_cap} shows a consolidation.", "A {severity} consolidative area is observed in {where}.", "Consolidation with air bronchogram is noted in {where}.",
        ),
        ("Consolidation in {where}.", "Consolidation.", "Pneumonic consolidation.", "{Severity} consolidation, likely pneumonia."),
        ("No consolidation is seen.", "There is no consolidation.", "Consolidation is not observed."),
    ),
    "Bronchiectasis": (
        (
            "Bronchiectasis is seen in {where}.", "There are bronchiectatic changes in {where}.", "The bronchi of {where} are dilated.",
            "{Severity} bronchiectasis is present in {where}.", "{where_cap} shows bronchiectasis.", "Cylindrical bronchiectasis is observed in {where}.",
        ),
        ("Bronchiectasis in {where}.", "Bronchiectasis.", "Bronchiectatic changes.", "{Severity} bronchiectasis."),
        ("No bronchiectasis is seen.", "The bronchi are not dilated.", "Bronchiectasis is not observed."),
    ),
    "Interlobular septal thickening": (
        (
            "Interlobular septal thickening is seen in both lungs.", "The interlobular septa are {severity_ly} thickened.", "There is {severity} smooth septal thickening.",
            "Thickened interlobular septa are present at the bases.", "Septal lines are observed in the periphery.", "Interlobular septal thickening of {severity} degree is noted.",
        ),
        ("Interlobular septal thickening.", "Septal thickening.", "{Severity} interlobular septal thickening.", "Thickened interlobular septa."),
        ("No interlobular septal thickening is seen.", "The interlobular septa are not thickened.", "Septal thickening is not observed."),
    ),
}  # fmt: skip

KINDS = {
    "pacemaker": "cardiac pacemaker", "sternotomy": "set of sternotomy wires", "port": "central venous port catheter",
    "stent": "aortic stent", "solid": "solid", "subsolid": "subsolid", "mediastinal": "mediastinal", "axillary": "axillary",
}  # fmt: skip

NORMAL = (
    "Trachea and both main bronchi are open.", "The calibre of the mediastinal vessels is normal.", "The oesophagus is of normal calibre.",
    "Upper abdominal organs in the sections are unremarkable.", "Bone structures show no destructive lesion.", "The thyroid is unremarkable where imaged.",
    "The chest wall is unremarkable.", "Both adrenal glands are normal.", "Degenerative changes are seen in the spine.", "The liver is homogeneous.",
)  # fmt: skip

NORMAL_IMPRESSIONS = (
    "No acute finding in the chest.", "Chest CT within normal limits.", "No significant abnormality.", "Normal thorax CT.",
)  # fmt: skip

CLINICAL = (
    "Cough and shortness of breath.", "Chest pain.", "Follow-up.", "Fever, suspected pneumonia.", "Weight loss.", "Preoperative assessment.",
    "Dyspnoea for two weeks.", "Smoker, screening.", "Known malignancy, staging.", "Control examination.", "Haemoptysis.", "Back pain.",
)  # fmt: skip

TECHNIQUES = {
    False: ("Non-contrast images of {slice} mm thickness were obtained.", "Axial sections without contrast medium, {slice} mm.", "Unenhanced thorax CT."),
    True: ("Images of {slice} mm thickness were obtained after intravenous contrast.", "Contrast-enhanced axial sections, {slice} mm.", "Thorax CT with intravenous contrast medium."),
}  # fmt: skip
